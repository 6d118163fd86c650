"""Home Depot product search relevance: its files are plain tables already, so that the schema alone reads them."""
