"""What a comparison's numbers are made into: tables (for both), a page, and Markdown."""
