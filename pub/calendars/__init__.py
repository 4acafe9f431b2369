"""The exchanges that KIS trades, their sessions, and when a token is needed for them."""
