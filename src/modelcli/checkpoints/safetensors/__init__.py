"""safetensors: a JSON header, then the tensors' bytes."""
