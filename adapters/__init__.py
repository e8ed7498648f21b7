"""What an adapter is and where it lives. Imports neither torch nor anything of the server."""
