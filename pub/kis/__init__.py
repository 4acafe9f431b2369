"""KIS's Open API: its codes, and the HTTP requests that tokens need."""
