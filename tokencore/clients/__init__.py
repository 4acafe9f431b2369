"""What uses a token: requests and httpx, the websocket's approval key, and the files of other KIS clients."""
