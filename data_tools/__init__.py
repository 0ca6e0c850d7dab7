"""Raw text and code to the indexed datasets that training reads."""
