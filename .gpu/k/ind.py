import torch, swiftep, swiftep.torch as st
from swiftep import Layout, Sizing
T,H,K,E=64,256,2,4
c=swiftep.Communicator.threads(1)[0]
for layout in Layout:
  for sizing in Sizing:
    torch._dynamo.reset()
    b=st.Buffer(c,swiftep.Plan(1,T,H,K,E,dtype=torch.float32,combine_dtype=torch.float32,result_count=8,layout=layout),workers=8,timeout=10)
    x=torch.randn(T,H,device="cuda",requires_grad=True); w=torch.rand(T,K,device="cuda",requires_grad=True)
    idx=torch.rand(T,E,device="cuda").topk(K).indices
    def f(x,w):
        d=b.dispatch(torch.relu(x)*2,idx,w,layout=layout,sizing=sizing)
        return torch.sin(b.combine(d.rows*3,d.handle,row_weights=None if layout==0 else w,bias=x))
    try:
        y=torch.compile(f,fullgraph=True)(x,w); r=f(x,w); g=torch.randn_like(y)
        ins=(x,) if layout==0 else (x,w)
        a=torch.autograd.grad(y,ins,g); e=torch.autograd.grad(r,ins,g)
        print(layout.name,sizing.name,(y-r).abs().max().item(),[(p-q).abs().max().item() for p,q in zip(a,e)],flush=True)
    except Exception as err:
        print(layout.name,sizing.name,"FAILED",type(err).__name__,str(err)[:300],flush=True)
    torch.cuda.synchronize(); b.close()
