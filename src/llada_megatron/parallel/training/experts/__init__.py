"""What a training run says of its experts: who computes, what the routers do, what the busiest rank costs."""
