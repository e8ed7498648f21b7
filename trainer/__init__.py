"""Training of adapters for the base the server serves, and their publication to the store.

settings.py       every setting of a run, checked
data.py           rows, and what is wrong with a file
encoding.py       rows to token ids and the mask of what to learn
packing.py        several short rows in one, each by itself
batches.py        which examples make a step, and a batch's tensors
prepare.py        from settings to what can be trained on; nothing is loaded yet
methods/          how the base is held while its adapter trains: lora, qlora; full
loss.py           the loss on a batch; crossentropy.py without all logits at once
optim.py          the optimizer and its state; schedule.py the learning rate
loop.py           the optimisation
checkpoints.py    exact checkpoints; run_directory.py what a run leaves on disk
memory.py         what a step takes, known beforehand; preview.py what is learned, to look at
fit.py            one run from settings to a trained adapter
groups.py         the processes that train together; launch.py starts them; sharding.py splits the weights
served.py         the server's own forward pass in this process
reference.py      the trainer's on the files that are shipped
evaluate.py       what an adapter scores
publish.py        the gate between a run and the store
compare.py        methods against each other
sweep.py          many small runs over one base; lanes.py their adapters in one forward pass
tasks/            tasks whose answers a program can check
report.py         a run on one page; plots.py its pictures; trackers.py where else its numbers go
commands/, cli.py the command line
"""
