"""Training of adapters for the base the server serves, and their publication to the store.

data.py     rows of chat messages, and what is wrong with a file
encoding.py rows to token ids and the mask of what to learn
batches.py  which examples make a batch, and its tensors
methods/    how the frozen base is held while training: lora, qlora
settings.py the numbers of a run
loop.py     the optimisation
publish.py  the trained adapter into the store
fit.py      one run from names to a published version
cli.py      the command line
"""
