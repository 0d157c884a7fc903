"""`arat report`: what runs came to, as one self-contained HTML page and the same plots as PNG files."""
