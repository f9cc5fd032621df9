"""Results as views: the JSON documents of the contract, key by key, with their tables. One file a command."""
