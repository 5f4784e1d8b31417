"""(filled below)"""
def mend_construction(): return False
def mend_tied_weights(): return False
def mend_generation(): return False
def replace_t5(): return False
