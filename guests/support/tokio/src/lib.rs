//! tokio, for child operators.
//!
//! Everything is the real tokio's (`upstream/`, which `prepare.sh` copies), but for three modules:
//! [`runtime`], whose `block_on` hands `main`'s future to an executor that runs in steps, [`signal`],
//! which resolves when the parent asks the child to stop, and the blocking functions of [`task`].
//! Sockets, files, processes and standard streams are left out: a program that names them does not
//! compile.

pub use tokio_macros::{main, test};
pub use tokio_upstream::*;

pub mod runtime {
    //! The runtime of a child: one, without threads, whatever was asked for.

    use std::future::Future;

    pub use tokio_upstream::runtime::*;
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
    //!
    //! As with a signal, a program that never listens for it ends at once.

    use wasm_operator_guest::stop::Listener;

    /// Resolves when the parent asks this child to stop.
    ///
    /// # Errors
    /// None.
    pub async fn ctrl_c() -> std::io::Result<()> {
        Listener::new().requested().await;
        Ok(())
    }

    pub mod unix {
        //! Unix signals. SIGTERM, SIGINT and SIGQUIT are the parent's request to stop, the others
        //! never come.

        use super::Listener;

        /// A kind of signal.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct SignalKind(i32);

        impl SignalKind {
            /// SIGHUP.
            pub const fn hangup() -> Self {
                Self(1)
            }

            /// SIGINT.
            pub const fn interrupt() -> Self {
                Self(2)
            }

            /// SIGQUIT.
            pub const fn quit() -> Self {
                Self(3)
            }

            /// SIGUSR1.
            pub const fn user_defined1() -> Self {
                Self(10)
            }

            /// SIGUSR2.
            pub const fn user_defined2() -> Self {
                Self(12)
            }

            /// SIGTERM.
            pub const fn terminate() -> Self {
                Self(15)
            }

            /// By Linux's number.
            pub const fn from_raw(number: i32) -> Self {
                Self(number)
            }

            /// Linux's number.
            pub const fn as_raw_value(&self) -> i32 {
                self.0
            }
        }

        /// Listens for a kind of signal; without a listener, it is one that never comes.
        #[derive(Debug)]
        pub struct Signal(Option<Listener>);

        /// Listens for signals of that kind.
        ///
        /// # Errors
        /// None.
        pub fn signal(kind: SignalKind) -> std::io::Result<Signal> {
            let stops = [
                SignalKind::interrupt(),
                SignalKind::quit(),
                SignalKind::terminate(),
            ];
            Ok(Signal(stops.contains(&kind).then(Listener::new)))
        }

        impl Signal {
            /// Resolves when the signal comes.
            pub async fn recv(&mut self) -> Option<()> {
                match &mut self.0 {
                    Some(listener) => listener.requested().await,
                    None => std::future::pending().await,
                }
                Some(())
            }
        }
    }
}

pub mod task {
    //! Tasks. Without threads, blocking work runs on the only one there is.

    pub use tokio_upstream::task::*;

    /// Runs blocking work as a task of its own. Nothing else runs meanwhile, and the parent ends a
    /// child that computes for too long.
    pub fn spawn_blocking<F, R>(work: F) -> JoinHandle<R>
    where
        F: FnOnce() -> R + Send + 'static,
        R: Send + 'static,
    {
        tokio_upstream::spawn(async move { work() })
    }

    /// Runs blocking work here and now.
    pub fn block_in_place<F, R>(work: F) -> R
    where
        F: FnOnce() -> R,
    {
        work()
    }
}
