"""The command line: parses, calls one function of `pipeline`, prints."""
