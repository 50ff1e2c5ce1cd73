"""One HTML page of results, and the captures of kept text that it can show."""
