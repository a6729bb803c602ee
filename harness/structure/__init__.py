"""What a decoder consists of, derived from one recorded forward and from no module's name.

tape       a forward as a straight line of calls, recorded and run again
graph      which values of a tape come from which
norms      what kind of norm a module is, found by trying it
residual   who writes and reads the residual stream, and what rotations it bears
readings   what matrix products read, and what that comes from
site       the words for one such activation: Matrix, Norm, Feed, Site
naming     what sites are called
describe   the sites of each block, put together from these
derive     the tape of a model -> its Structure, with the reason of each refusal
structure  the words for the whole decoder: Residual, Attention, Structure
facts      the config of a model, its sizes checked
skeleton   a model without weights, from its config alone
table      a Structure for a person: python -m harness.structure MODEL
"""
