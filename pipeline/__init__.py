"""THE METHOD: one file or folder for each stage. `run.py` reads from top to bottom like the paper.

Folders and stages from the top floor down; none imports one above it:

run, front, report    everything for one target; for several; what was found
target                measured speedup against the target: measure longer, search faster, give back
search/               which level for each layer; its methods in search/methods/
stitch                the network at those levels, its statistics corrected where that is better
training/             the pruned network trained: repair, fine-tuning, gradual pruning in a loop of your own
database/             weights of every layer at every level; its pruners in database/pruners/
latency/              seconds of every layer at every level, measured in the runtime
deploy                the pruned ONNX file
aim, opponent         what is settled before a run: runtime and target; the best dense alternative against the result
validate,             the speedup and the metric, measured; the dense network in every other runtime
  alternatives

What all of them use:

level, mask           what a layer may become
data, user_data,      samples; what people hand over as data; what is padding in it; which row of an output is whose
  padding, rows
network, shorten      the network with the weights that a stage names; the pruned network, a value; samples without the
                      padding that all of them have
loss, channel_error,  what a pruned network is scored by: losses, the one that fits the outputs, on calibration samples
  class_outputs,
  objective
metric                what people judge by
correct               statistics of pruned layers brought back
costs, solve          times of layers x levels; the dynamic programme
profile, artifact     files that the stages leave
progress              how far a stage is; the wish to stop
engine                opening runtimes
quantised/            the network in int8, by the engines' own tools
"""
