"""A conversation in the terminal, with a server over HTTP: `glmd chat` without its flags."""
