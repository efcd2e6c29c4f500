def foreign(place):
    raise NotImplementedError
