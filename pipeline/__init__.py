"""THE METHOD: one file for each stage, in the order in which they run.

level, mask           what a layer may become
data, network, loss   samples in, network, loss out
latency               seconds of every layer at every level, measured in the runtime
hessian, pruners,     weights of every layer at every level
  database
solve, searches       which level for each layer
search, profile_loss  that question, asked of one network, table and database
stitch, correct       the network at those levels, its statistics repaired
deploy                the pruned ONNX file
match, gradual        zeros in a user's own module, while it is trained
dense_outputs,        what training needs: the dense network's outputs, where it stopped, the loop
  checkpoint, train
repair, finetune      the pruned network trained, masks fixed or growing
for_transformers,     callbacks for the Trainers of others
  for_lightning
validate, aim         the speedup and the metric, measured; aimed again until the target is met
report, run           what was found; all of it
"""
