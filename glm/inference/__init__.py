"""SGLang as a process of its own, spoken to over HTTP: the trainer and the engine never share one."""
