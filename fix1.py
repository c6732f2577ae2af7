from fix import fix
fix("06_mlps",("> Which networks obey the ansatz, when it is a theorem, and what happens when the feature is a wrong one.","> Which networks obey the ansatz, when it is a theorem, and what a wrong feature does."),
 ("assert worst < 1e-6 and min(drift.values()) > 10 * worst       # the flow conserves what finite steps lose","assert worst < 1e-6 and min(drift.values()) > 10 * worst    # steps lose what the flow conserves"),
 ('''        show(ax, picture(images[y == label][1]), f"{kind}: {photos.classes[9 * label]}", cmap="gray")''','''        title = f"{kind}: {photos.classes[9 * label]}"
        show(ax, picture(images[y == label][1]), title, cmap="gray")'''))
fix("08_rnns",("> Every gate of an RNN, a GRU or an LSTM is a linear map used once per character: its AGOP sums over time.","> Every gate is a linear map, used once per character: its AGOP sums over time."),
 ('''    "Rows of a recurrent module's matrices, side by side, as one linear map without weights of its own."
''','''    """Rows of a recurrent module's matrices, side by side, as one linear map.

    It owns no weights: it reads the module's when asked."""
'''),
 ('''labels = {"pearson": "NFM and AGOP$^{1/2}$, trained", "pearson_forced": "... deltas rotated (forced)",
          "pearson_init"''','''labels = {"pearson": "NFM and AGOP$^{1/2}$, trained",
          "pearson_forced": "... deltas rotated (forced)",
          "pearson_init"'''),
 ('''    "How often each code occurs in the training data; padding, read only after the end, does not count."
''','''    "How often each code occurs in the training data; padding does not count."
'''),
 ('''    count[0] = 0
    return count''','''    count[0] = 0                        # read only after the end
    return count'''))
fix("book/train",('''    """Train a network, or load its weights where the same training was done before.

    The configuration of the net, the seed and a sample of the data must be those of the stored file, which
    is looked for beside the notebooks (`nbs/weights`) and in `out_dir()/weights`; with others the network is
    trained anew. A killed run goes on from its last checkpoint. Raises ValueError for a bad name or module,
    FloatingPointError when the loss is no longer finite."""''','''    """Train a network, or load its weights where the same training was done before.

    The configuration of the net, the seed and a sample of the data must be those of the stored
    file, which is looked for beside the notebooks (`nbs/weights`) and in `out_dir()/weights`; with
    others the network is trained anew. A killed run goes on from its last checkpoint. Raises
    ValueError for a bad name or module, FloatingPointError when the loss is no longer finite."""'''),
 ('''    "Train a net up to its `max_epochs` and store it: its file (None where that fails) and metadata."
''','''    "Train a net up to its `max_epochs`; the file (None where it cannot be written) and metadata."
'''),
 ('''        raise KeyboardInterrupt(f"training {name!r} stopped after {len(net.history)} of {epochs} epochs")
''','''        raise KeyboardInterrupt(f"training {name!r} stopped after {len(net.history)}"
                                f" of {epochs} epochs")
'''))
fix("book/weights",('''                 net,         # a trained skorch net; its module is left rounded as the file is''','''                 net,         # a trained skorch net; its module is left rounded'''),
 ('''                  net,         # a trained skorch net; its module is left rounded as the file is''','''                  net,         # a trained skorch net; its module is left rounded''')) if False else None
