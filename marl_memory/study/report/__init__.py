"""The report on a study: a page, the same as Markdown with pictures, and its tables."""
