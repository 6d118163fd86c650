"""The proxy: speaks TensorFlow Serving's API to clients and to model servers, and forwards each request.

command.py has the flags, workers.py runs the processes, server.py forwards requests, routing.py decides where to,
backends.py watches the model servers; calls.py makes and answers calls, on the wire of serving/wire/.
"""
