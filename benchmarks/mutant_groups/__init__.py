"""The wrong lines themselves: for each file the tests that are to notice, and old and new text of a line."""
