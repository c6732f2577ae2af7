import sys; sys.path.insert(0,'/tmp/w')
from nbedit import edit
R="/work/wt-train/nbs/"
def fix(nb, *pairs): edit(R+nb+".ipynb", pairs)
