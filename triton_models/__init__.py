"""The model repository of a served bundle, as Triton will read it, with few $placeholders.

    tagger/       the bundle's NAME: encoded images in, labels out
    graph/        NAME_snippets, NAME_classifier and NAME_text: one of the bundle's graphs, tensors in, tensors out
    cliplet_paths.py    goes beside each model.py, which imports it before all else

`cliplet.deploy.repository` fills the placeholders from the contract, the plan and the bundle; the model files are
copied as they are. What they do lies in `cliplet.deploy.triton_backend`, where it is tested without a server.
"""
