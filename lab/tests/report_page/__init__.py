"""The page of `tdlrt report` in a browser: where things stand on it, and what is wrong with it."""
