//! Stands in for gloo-timers, which crates use on every wasm target as if it were a browser.

pub mod future {
    //! Timers as futures.

    use std::future::Future;
    use std::pin::Pin;
    use std::task::{Context, Poll};
    use std::time::Duration;

    /// Resolves after its time.
    #[derive(Debug)]
    pub struct TimeoutFuture(Pin<Box<tokio::time::Sleep>>);

    impl Future for TimeoutFuture {
        type Output = ();

        fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
            self.0.as_mut().poll(context)
        }
    }

    /// Resolves after that time.
    pub fn sleep(duration: Duration) -> TimeoutFuture {
        TimeoutFuture(Box::pin(tokio::time::sleep(duration)))
    }
}
