"""The command `moe`, for people who use a deployment.

    main                                            the command and its subcommands
    generate, tokenize                              ask a model; sampling and timing belong to them
    chat                                            talks to a chat model over HTTP
    status                                          what is deployed: report, rendering and scaling_rows
    rollout                                         how a change goes on, and how to take it back
    kube                                            the kubeconfig, and errors in one sentence

`moe load` and `moe replay` are in `moe_tools`.
"""
