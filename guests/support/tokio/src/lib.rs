//! tokio, for child operators.
//!
//! Everything is the real tokio's (`upstream/`, which `prepare.sh` copies), but for two modules:
//! [`runtime`], whose `block_on` hands `main`'s future to an executor that runs in steps, and
//! [`signal`], which resolves when the parent asks the child to stop.

pub use tokio_macros::{main, test};
pub use tokio_upstream::*;

pub mod runtime {
    //! The runtime of a child: one, without threads, whatever was asked for.

    use std::future::Future;

    pub use tokio_upstream::runtime::{EnterGuard, Handle, RuntimeFlavor, RuntimeMetrics};
    use wasm_operator_guest::executor::{MainOutput, run_main, runtime};

    /// Takes all settings of tokio's builder; a child has one thread and no sockets.
    #[derive(Debug, Default)]
    pub struct Builder(());

    impl Builder {
        /// A builder of the only runtime there is.
        pub fn new_current_thread() -> Self {
            Self(())
        }

        /// The same: there are no threads.
        pub fn new_multi_thread() -> Self {
            Self(())
        }

        /// Has no effect.
        pub fn worker_threads(&mut self, _: usize) -> &mut Self {
            self
        }

        /// Has no effect.
        pub fn max_blocking_threads(&mut self, _: usize) -> &mut Self {
            self
        }

        /// Has no effect.
        pub fn thread_name(&mut self, _: impl Into<String>) -> &mut Self {
            self
        }

        /// Has no effect.
        pub fn thread_stack_size(&mut self, _: usize) -> &mut Self {
            self
        }

        /// Has no effect: time is always there, sockets never.
        pub fn enable_all(&mut self) -> &mut Self {
            self
        }

        /// Has no effect.
        pub fn enable_io(&mut self) -> &mut Self {
            self
        }

        /// Has no effect.
        pub fn enable_time(&mut self) -> &mut Self {
            self
        }

        /// The runtime.
        ///
        /// # Errors
        /// None.
        pub fn build(&mut self) -> std::io::Result<Runtime> {
            Runtime::new()
        }
    }

    /// The runtime of this child.
    #[derive(Debug)]
    pub struct Runtime(());

    impl Runtime {
        /// The runtime.
        ///
        /// # Errors
        /// None.
        pub fn new() -> std::io::Result<Self> {
            runtime();
            Ok(Self(()))
        }

        /// Runs the future of `main`: to its first idle point now, and on with every event. What
        /// stands behind this call in `main` does not run; when the future ends, the child exits.
        pub fn block_on<F>(&self, future: F) -> F::Output
        where
            F: Future + 'static,
            F::Output: MainOutput,
        {
            run_main(future)
        }

        /// A handle for spawning.
        pub fn handle(&self) -> &Handle {
            runtime().handle()
        }

        /// Spawns a task.
        pub fn spawn<F>(&self, future: F) -> crate::task::JoinHandle<F::Output>
        where
            F: Future + Send + 'static,
            F::Output: Send + 'static,
        {
            runtime().spawn(future)
        }

        /// Makes this runtime the current one.
        pub fn enter(&self) -> EnterGuard<'_> {
            runtime().enter()
        }
    }
}

pub mod signal {
    //! The parent's request to stop, which is what signals are to a child.

    /// Resolves when the parent asks this child to stop.
    ///
    /// # Errors
    /// None.
    pub async fn ctrl_c() -> std::io::Result<()> {
        wasm_operator_guest::executor::stopped().await;
        Ok(())
    }

    pub mod unix {
        //! Unix signals, of which those that ask for an end are known.

        /// A kind of signal.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct SignalKind(bool);

        impl SignalKind {
            /// SIGTERM: the parent's request to stop.
            pub const fn terminate() -> Self {
                Self(true)
            }

            /// SIGINT: the parent's request to stop.
            pub const fn interrupt() -> Self {
                Self(true)
            }

            /// SIGHUP, which never comes.
            pub const fn hangup() -> Self {
                Self(false)
            }

            /// SIGQUIT: the parent's request to stop.
            pub const fn quit() -> Self {
                Self(true)
            }
        }

        /// A listener for a kind of signal.
        #[derive(Debug)]
        pub struct Signal(SignalKind);

        /// Listens for signals of that kind.
        ///
        /// # Errors
        /// None.
        pub fn signal(kind: SignalKind) -> std::io::Result<Signal> {
            Ok(Signal(kind))
        }

        impl Signal {
            /// Resolves when the signal comes, once.
            pub async fn recv(&mut self) -> Option<()> {
                if !self.0.0 {
                    std::future::pending::<()>().await;
                }
                self.0 = SignalKind(false);
                wasm_operator_guest::executor::stopped().await;
                Some(())
            }
        }
    }
}
