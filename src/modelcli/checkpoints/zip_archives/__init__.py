"""Zip archives, read strictly and written without compression: for formats that are made of one."""
