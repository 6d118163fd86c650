"""Home Depot product search relevance. Its files are plain tables, so the schema reads them without a converter."""
