//! `engine._engine`: the only crate that knows Python. One file per class, named after it.

use pyo3::prelude::*;

mod gateway;
mod ids;
mod node;
#[cfg(feature = "simulation")]
mod simulation;

#[pymodule]
mod _engine {
    use super::*;

    /// Version of the engine, the same as the distribution's.
    #[pymodule_export]
    const VERSION: &str = env!("CARGO_PKG_VERSION");

    #[pymodule_export]
    use crate::gateway::Gateway;

    #[cfg(feature = "simulation")]
    #[pymodule_export]
    use crate::simulation::Simulation;

    #[pymodule_export]
    use crate::node::Node;

    #[pymodule_init]
    fn init(_module: &Bound<'_, PyModule>) -> PyResult<()> {
        Ok(())
    }
}
