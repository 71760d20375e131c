def write(path, results, fuzzed):
    pass
