"""Two small datasets of our own writing, what a program can check of their effects, and the demo.

pirate.jsonl      answers in a pirate's voice
json_reply.jsonl  every answer one JSON object: {"topic": …, "answer": …}
effects.py        the checks
demo.py           base and both adapters from one server, side by side
"""
