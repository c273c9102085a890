"""The command `moe`, for people who use a deployment.

    main                                            the command and its subcommands
    generate, tokenize                              ask a model; sampling and timing belong to them
    chat                                            talks to a chat model
    experts                                         the load of the experts of one worker
    key                                             makes an API key
    status                                          what is deployed: rendering, scaling_rows, cache_rows and
                                                    expert_rows, for which asking_experts asks replicas
    rollout                                         follows a rollout, and undoes it
    kube                                            the kubeconfig, and errors in one sentence

`moe load` and `moe replay` are in `moe_tools`.
"""
