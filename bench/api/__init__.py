"""The service under load: its answers' times, its streams and its memory. See __main__.py."""
