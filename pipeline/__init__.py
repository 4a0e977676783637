"""THE METHOD: one file or folder for each stage. `run.py` reads from top to bottom like the paper.

Folders and stages from the top floor down; none imports one above it:

run, front, report    everything for one target; for several; what was found
target                measured speedup against the target: measure longer, search faster, give back
search/               which level for each layer; its methods in search/methods/
stitch, correct       the network at those levels, its statistics corrected
training/             the pruned network trained: repair, fine-tuning, gradual pruning in a loop of your own
database/             weights of every layer at every level; its pruners in database/pruners/
latency/              seconds of every layer at every level, measured in the runtime
deploy                the pruned ONNX file
validate,             the speedup and the metric, measured; the dense network in every other runtime
  alternatives

What all of them use:

level, mask           what a layer may become
data, network,        samples in, network, padding
  padding
loss, objective,      what a pruned network is scored by
  metric
solve                 the dynamic programme
profile, artifact     files that the stages leave
engine                opening runtimes
"""
