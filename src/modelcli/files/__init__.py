"""Files of the system: opened in a known folder, locked, and replaced in one step."""
