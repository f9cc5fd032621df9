"""Turn the results of commands into views: a JSON document and a table. Each command has a file of its own."""
