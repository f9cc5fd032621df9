"""From values to what is shown: JSON documents, and the tables, CSV and markdown made of their rows."""
