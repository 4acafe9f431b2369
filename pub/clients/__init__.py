"""Ways to use a token: with requests and httpx, for the websocket's approval key, in the files of other KIS clients."""
