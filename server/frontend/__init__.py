"""The front end: text to tokens and back, one stream a request, and the engine process. Imports neither torch nor protobuf."""
