"""Reports of a race: HTML, Markdown, terminal."""
