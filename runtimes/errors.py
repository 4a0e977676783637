"""The base of every error that a user may see.

It stands here because runtimes alone travels to other machines; it imports nothing, so that everybody may import it.
"""


class OnnxSpdyError(Exception):
    """Something that was asked for can't be done. One line: what is wrong, with which value, and what to do.

    Each is a builtin too, so that `except ValueError` does what one expects. They are defined beside what raises them.

    OnnxSpdyError
    |- ModelError               models: the network is damaged, or holds what isn't known here
    |  |- UnsupportedOperator   ... an operator
    |  |- GroupError            ... a group of units that doesn't exist or can't shrink, or hasn't these units
    |  |- RunFailed             ... ONNX Runtime can't run it
    |  `- InputTooLarge         ... random values for an input would take too much memory
    |- NoForm                   a runtime that runs no networks in int8
    |- RuntimeFailure           runtimes: an engine did not do what it was asked to do
    |  |- RuntimeUnavailable    ... it can't be used on this machine
    |  |- ModelRefused          ... it (or we, on its behalf) won't take this model
    |  |- EngineCrashed         ... its process died
    |  `- EngineHung            ... its process gave no answer in time
    |- UnknownRuntime           no runtime has that name
    |- UnknownPrecision         a runtime isn't run in that precision
    |- UnreadableLog            what an engine says of itself isn't understood
    |- WorkloadError            batch, threads or inputs that no engine can run, or that don't fit the network
    |- MeasurementError         a measurement that is damaged, or too short for what is asked of it
    |- ArtifactError            pipeline: a file of an earlier stage is damaged, or made from something else
    |  `- FolderInUse           ... another process works in the folder
    |- ClusterError             a cluster that can't be used, or was lost
    |- DataError                samples that are damaged, or don't fit the network
    |- RowsError                outputs that don't tell which of them belongs to which sample
    |- LevelError               no such pattern or level
    |- LossError                a loss that doesn't fit the network's outputs or the data
    |- MetricError              a metric that doesn't fit them
    |- NothingToPrune           no layer of the network can be pruned, or no group can shrink
    |- MachineBusy              other programs use the CPU, so that nothing true can be measured
    |- NoSpeedup                the runtime can't run this network faster, whatever is pruned
    |- UnknownPruner            no pruner has that name
    |- NoUnitPruner             a pruner that can't remove units
    |- SeveralLevels            layers that are pruned one after another have one level
    |- PrunerFailed             a pruner returned weights that are not what its level says
    |- PrunerResult             a pruner returned no weights
    |- UnusableHessian          inputs of a layer that no pruner can compute with
    |- MemoryTooSmall           the memory that was given doesn't suffice for one layer
    |- UnknownSearch            no search has that name
    |- InvalidCosts             times or errors that nothing can be solved with
    |- InfeasibleTarget         the fastest profile is still too slow
    |- NotCorrected             too few samples for one batch of the network
    |- DeployError              the written network is not what the profile says
    |- AlternativesError        no engine runs a network that was to be measured in all of them
    |- AimError                 there is no runtime to aim in, or no opponent to be against
    |- FleetError               devices that make no fleet, or can't have one network
    |- RangeError               activations that no grid of 8 bits can hold
    |- NothingToQuantise        no layer of the network can compute in int8
    |- QuantisationFailed       an engine's own tools can't quantise the network
    |- TargetMissed             everything was tried and measured, and the target is out of reach
    |- UnknownRepair            no repair has that name
    |- FinetuneError            the pruned network doesn't belong to the dense one
    |- ParameterMismatch        a layer that can't be found among a module's parameters
    |- TrainingDiverged         the loss of a training is no finite number
    |- StoredError              a mapped weight can't be read from its file any more
    |- SpecError                tools: an argument names nothing that can be used
    |- StepFailed               a step that a benchmark watches ended with an error
    `- NoTorchPruning           Torch-Pruning is missing, or can't prune the module
    """


def described(exc: BaseException, limit: int | None = None) -> str:
    """An exception in one line: its type, and its message where it has one, cut at `limit` characters."""
    text = " ".join(str(exc).split())[:limit]
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__
