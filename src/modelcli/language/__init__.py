"""The texts that people write: selectors, module expressions, references, inputs; and how words are quoted."""
