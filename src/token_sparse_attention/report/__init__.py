"""One HTML page of results, and the captures of kept text that it can show."""

TITLE = "Token sparse attention: report"  # of a page that is given none
