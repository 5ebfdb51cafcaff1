"""Fixtures that every test may ask for. That this file lies here puts `builders` and `fakes` on the path."""
