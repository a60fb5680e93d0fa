"""What the loop itself costs, from one worker to a thousand. See __main__.py."""
