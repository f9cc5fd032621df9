"""Zip archives for the formats that use them: read strictly, and written without compression."""
