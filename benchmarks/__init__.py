"""This project's own studies: what they measure, their results, and the pages made of those."""
